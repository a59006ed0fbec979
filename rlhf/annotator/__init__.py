"""Annotators: take K responses per prompt, return one graded comparison per prompt."""

"""Checks of a plan that involve more than one constructor; each raises `UserError` for a step that could not run."""

"""A plugin whose stages compute nothing: the pipeline is tested with it."""

"""Plugin whose stages compute nothing, for the tests of pipelines."""

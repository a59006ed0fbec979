"""Group relative policy optimization: advantages from the other responses to the same prompt, no critic."""

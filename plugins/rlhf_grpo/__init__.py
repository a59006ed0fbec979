"""Group relative policy optimisation: advantages from the other replies to the same prompt, no critic."""

"""Lightning callbacks: checkpoints, progress, signals, signs of reward hacking."""

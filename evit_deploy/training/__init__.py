"""Training and fine-tuning: the loop, its tasks, schedules, state and log."""

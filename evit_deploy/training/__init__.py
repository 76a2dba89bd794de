"""Fine-tuning: the loop, its tasks, schedules, state and log."""

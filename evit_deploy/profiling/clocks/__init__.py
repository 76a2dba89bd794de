"""What time is: calls in turns on each kind of device, a GPU's own time and clock rates, and latencies condensed."""

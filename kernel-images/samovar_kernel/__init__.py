"""What runs inside every sandbox: supervisor (PID 1) and kernel. Imports nothing of the host's packages."""

"""The kernel's side of the agent: loads the BPF programs, reads what they count. Nothing else knows the kernel."""

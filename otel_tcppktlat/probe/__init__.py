"""The kernel's side of the agent: loading the BPF programs and reading what they count. Nothing else knows the kernel."""

"""What suits a machine: formats, memory, and what to install."""

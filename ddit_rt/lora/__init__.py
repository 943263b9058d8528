"""Style LoRA files, fused into the live weights and taken out again bit for bit."""

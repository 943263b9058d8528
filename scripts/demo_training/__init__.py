"""Parts of `scripts/train_demo.py`: one recipe, and what sets its two models apart."""

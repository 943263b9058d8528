"""Stages of the training of the embedded demo model; `train_demo_model.py` is their command."""

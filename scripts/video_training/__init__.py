"""Stages of the training of the embedded video model; `train_video_model.py` is their command."""

"""The laboratory: measuring, calibrating, evaluating and training. The runtime never imports it."""

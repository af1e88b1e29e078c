"""Evaluation of a trained model: metrics, plots, report, prediction, speed."""

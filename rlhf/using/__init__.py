"""Use of a trained model: chat, batch generation, evaluation, export."""

"""What one does with a model that was made: talk with it, let it answer, measure it, take it elsewhere."""

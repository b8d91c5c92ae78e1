"""What an approximation costs, as figures of a model: recall of facts, accuracy on a text, distance from no cache."""

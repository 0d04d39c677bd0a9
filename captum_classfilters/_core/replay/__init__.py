"""What a model puts out without some filters, at the cost of what follows the layer."""

"""Parameters that stay fp32 through every cast of the model around them."""

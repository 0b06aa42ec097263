"""Jobs: conversions that can be interrupted and resumed, with several processes."""

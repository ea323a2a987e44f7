"""transformers' Cache contract over packed layers."""

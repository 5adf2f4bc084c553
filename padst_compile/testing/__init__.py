"""Help for testing code that uses this package. `strategies` needs Hypothesis, which the `test` extra installs."""

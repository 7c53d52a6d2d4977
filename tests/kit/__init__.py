"""What tests share: the same tests for every implementation, from lists of cases."""

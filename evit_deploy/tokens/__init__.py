"""Which tokens stay: plan, operator, reduction methods and the contract of a model family."""

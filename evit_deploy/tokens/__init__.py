"""Token reduction: token plan, operators, reduction methods and the interface of a model family."""

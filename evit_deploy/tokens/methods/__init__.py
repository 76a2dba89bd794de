"""Reduction methods, one a file; :data:`evit_deploy.registry.METHODS` finds them."""

"""Reduction methods, one per file; they are registered in :data:`evit_deploy.registry.METHODS`."""

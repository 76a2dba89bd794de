"""``python -m evit_deploy`` is ``evit-deploy``."""

from evit_deploy.cli import main

main()

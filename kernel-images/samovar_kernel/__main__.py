"""`python -m samovar_kernel` runs the supervisor."""

from samovar_kernel.supervisor import main

main()

"""`python -m thawline` is `thawline`."""

from thawline.cli import main

main()

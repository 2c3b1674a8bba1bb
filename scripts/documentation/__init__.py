"""What `scripts.docs` builds: pages, API reference, and a look at their links."""

"""Private doors: what is used of other packages that they do not document. One file per package, one function per door."""

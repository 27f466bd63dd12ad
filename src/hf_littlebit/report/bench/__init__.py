"""How fast a model is and where its time goes, measured on real weights or on random ones."""

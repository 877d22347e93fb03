"""What runs on the cluster: manifest, train, evaluate, merge, export."""

"""Many engines behind one address: a front that listens, and replicas of one model that Ray Serve keeps alive."""

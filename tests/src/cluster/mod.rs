//! Clusters for tests: the image that nodes are made of, the nodes, corosync and Pacemaker in them.

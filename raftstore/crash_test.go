package raftstore_test

func childMain() bool { return false }

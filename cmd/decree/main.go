// Command decree is a container orchestrator whose only source of desired state is
// Git.
package main

func main() {}

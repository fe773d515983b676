// Command decree is a container orchestrator whose only source of desired state is
// Git. Called as git-remote-decree it is Git's remote helper for decree:// URLs.
package main

import (
	"os"
	"path/filepath"

	"decree.dev/decree/cmd/decree/internal/cli"
)

func main() {
	s := cli.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}
	if filepath.Base(os.Args[0]) == "git-remote-decree" {
		os.Exit(cli.RunGitRemote(os.Args[1:], s))
	}
	os.Exit(cli.Run(os.Args[1:], s))
}

package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/client"
)

// TestAgentElsewhere: an agent that is no part of a server joins with a token, runs what
// is pushed, and its containers are reached through every server, also after the one
// that it joined by is gone.
func TestAgentElsewhere(t *testing.T) {
	images, err := filepath.Abs(root + "/bin/images")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(images, "hello.tar")); err != nil {
		t.Fatalf("%v; run: go tool task build", err)
	}
	p := newControlPlane(t, 3)
	data := filepath.Join(p.dir, "agent")
	run := func(at *serverProcess, args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Env = append(os.Environ(), "DECREE_KUBECONFIG="+filepath.Join(at.data, "admin.kubeconfig"), "HOME="+p.dir,
			"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	must := func(at *serverProcess, args ...string) string {
		t.Helper()
		out, err := run(at, args...)
		if err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		return out
	}
	log, err := os.Create(data + ".log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	agent := exec.Command(p.binary, "agent", "--data", data, "--run", shortFolder(t), "--node", "n1", "--join", p.servers[1].address, "--token", p.token("agent", ""), "--images", images, "--log-level", "info")
	agent.Stdout, agent.Stderr = log, log
	agent.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = agent.Process.Signal(syscall.SIGTERM)
		_ = agent.Wait()
		must(p.servers[1], p.binary, "down", "--data", data, "--run", agentRun(agent), "--purge")
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("log of the agent:\n%s", text)
		}
	})

	repo := filepath.Join(p.dir, "repo")
	must(p.servers[2], "git", "clone", "-q", "decree://"+p.servers[2].address+"/cluster", repo)
	manifests, err := filepath.Glob(root + "/examples/hello/*.cue")
	if err != nil || len(manifests) == 0 {
		t.Fatalf("no manifests: %v", err)
	}
	must(p.servers[2], append([]string{"cp", "-t", repo}, manifests...)...)
	must(p.servers[2], "git", "-C", repo, "add", "-A")
	must(p.servers[2], "git", "-C", repo, "commit", "-qm", "hello")
	if out := must(p.servers[2], "git", "-C", repo, "push", "origin", "HEAD:main"); !strings.Contains(out, "healthy after") {
		t.Fatalf("the push did not end healthy:\n%s", out)
	}
	reach := func(at *serverProcess) {
		t.Helper()
		c, err := p.client(at)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		pods, _, err := client.List[*corev1.Pod](t.Context(), c, client.ListOptions{Namespace: "default"})
		if err != nil || len(pods) == 0 || pods[0].Spec.NodeName != "n1" {
			t.Fatalf("%s: %d pods, %v", at.name, len(pods), err)
		}
		if out := must(at, p.binary, "logs", pods[0].Name); !strings.Contains(out, "listening") {
			t.Errorf("%s: log %q", at.name, out)
		}
		// A second one cannot listen where the first does: it ran in the pod.
		if out, err := run(at, p.binary, "exec", pods[0].Name, "--", "/hello"); err == nil || !strings.Contains(out, "address already in use") {
			t.Errorf("%s: exec: %v %q", at.name, err, out)
		}
	}
	for _, s := range p.servers {
		reach(s)
	}
	p.kill(p.servers[1]) // the one that it joined by
	reach(p.servers[0])
	reach(p.servers[2])
}

// shortFolder is a folder whose name leaves room for sockets below it.
func shortFolder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "decree-a-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// agentRun is the run folder that an agent was given.
func agentRun(cmd *exec.Cmd) string {
	for i, a := range cmd.Args {
		if a == "--run" {
			return cmd.Args[i+1]
		}
	}
	return ""
}

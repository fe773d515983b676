package gitsource

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os/exec"
	"strings"
)

// Scheme is the URL scheme of built-in repositories for git: decree://HOST:PORT/NAME.
// For it git runs a program named git-remote-decree.
const Scheme = "decree"

// Credentials are the files with which git identifies itself and checks the server.
type Credentials struct {
	CAFile, CertFile, KeyFile string // PEM
}

// Streams are the standard streams of a remote helper.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// RemoteHelper does what git expects from git-remote-decree: args are the remote's
// name and its URL, decree://HOST:PORT/NAME. It hands the conversation over to
// git's own https helper with the credentials in its environment, and returns when
// that ends; an *exec.ExitError holds its status. env is the environment that git
// gave us.
func RemoteHelper(ctx context.Context, args, env []string, std Streams, cred Credentials) error {
	if len(args) != 2 {
		return errors.New("git-remote-decree is run by git: git clone decree://HOST:PORT/NAME")
	}
	address, err := helperURL(args[1])
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "git", "remote-https", args[0], address.String())
	cmd.Stdin, cmd.Stdout, cmd.Stderr = std.In, std.Out, std.Err
	cmd.Env = helperEnv(env, address.Hostname(), cred)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("git remote-https %s: %w", address.Redacted(), err)
	}
	return nil
}

// helperURL maps decree://HOST:PORT/NAME to where the API server has it.
func helperURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil {
		return nil, fmt.Errorf("git-remote-decree: %w", err)
	}
	name := strings.TrimSuffix(strings.Trim(u.Path, "/"), ".git")
	if u.Scheme != Scheme || u.Host == "" || u.User != nil || !ValidName(name) {
		return nil, fmt.Errorf("git-remote-decree: %s: the form is decree://HOST:PORT/NAME", u.Redacted())
	}
	return &url.URL{Scheme: "https", Host: u.Host, Path: "/git/" + name + ".git"}, nil
}

// helperEnv gives git's https helper our credentials and nothing that weakens them.
func helperEnv(env []string, host string, cred Credentials) []string {
	own := map[string]string{
		"GIT_SSL_CAINFO": cred.CAFile, "GIT_SSL_CERT": cred.CertFile, "GIT_SSL_KEY": cred.KeyFile,
		"GIT_SSL_NO_VERIFY": "", "GIT_SSL_CAPATH": "", "GIT_SSL_CERT_PASSWORD_PROTECTED": "",
	}
	var out []string
	noProxy := ""
	for _, kv := range env {
		k, v, _ := strings.Cut(kv, "=")
		if strings.EqualFold(k, "no_proxy") {
			noProxy = v
		}
		if _, ok := own[k]; !ok {
			out = append(out, kv)
		}
	}
	for k, v := range own {
		if v != "" {
			out = append(out, k+"="+v)
		}
	}
	if ip := net.ParseIP(host); host == "localhost" || (ip != nil && ip.IsLoopback()) {
		list := strings.Trim(noProxy+","+host, ",")
		out = append(out, "no_proxy="+list, "NO_PROXY="+list)
	}
	return out
}

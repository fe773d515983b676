package backup_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"filippo.io/age"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/backup"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/schemas/api"
)

func TestMain(m *testing.M) {
	if childMain() {
		return
	}
	goleak.VerifyTestMain(m)
}

// objects is how many objects the cluster of most tests has.
const objects = 10_000

// cluster is the state of a real store, and the commit that came into force in it.
var cluster = sync.OnceValue(func() *state.State {
	dir, err := os.MkdirTemp("", "decree-backup-")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	s, err := raftstore.Open(raftstore.Config{Dir: dir, NodeID: "one", Bootstrap: &command.Bootstrap{
		ServiceCIDR: netip.MustParsePrefix("10.97.0.0/16"), PodCIDR: netip.MustParsePrefix("10.98.0.0/16"),
		NodeMask: 24, DNS: netip.MustParseAddr("10.97.0.10"),
	}})
	if err != nil {
		panic(err)
	}
	defer s.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := s.WaitReady(ctx); err != nil {
		panic(err)
	}
	propose := func(t command.Txn) {
		r, err := s.Propose(ctx, t)
		if err == nil {
			err = r.Err()
		}
		if err != nil {
			panic(err)
		}
	}
	propose(create(&api.Source{TypeMeta: kind("Source"), ObjectMeta: metav1.ObjectMeta{Name: "shop"}}))
	servers := create(tokenObject(), serverObject(), authorityObject())
	servers.Actor = "server/one"
	propose(servers)
	propose(command.Txn{Actor: "git/shop", Commit: &command.Commit{Source: "shop", Revision: &api.Revision{
		TypeMeta: kind("Revision"), Spec: api.RevisionSpec{Source: "shop", Commit: "3f2a1c9", Result: api.RevisionApplied},
	}}})
	for i := 0; i < objects; i += 500 {
		var list []api.Object
		for j := i; j < i+500; j++ {
			list = append(list, secret(fmt.Sprintf("s%05d", j)))
		}
		t := create(list...)
		t.Key = fmt.Sprint("batch", i)
		propose(t)
	}
	return s.View()
})

func kind(name string) metav1.TypeMeta {
	return metav1.TypeMeta{APIVersion: api.GroupVersion.String(), Kind: name}
}

func tokenObject() api.Object {
	return &api.JoinToken{TypeMeta: kind("JoinToken"), ObjectMeta: metav1.ObjectMeta{Name: "old"}, Spec: api.JoinTokenSpec{
		Role: api.RoleAgent, Hash: fmt.Sprintf("%064d", 0), Expires: metav1.NewTime(time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)),
	}}
}

func serverObject() api.Object {
	return &api.Server{TypeMeta: kind("Server"), ObjectMeta: metav1.ObjectMeta{Name: "one"}, Spec: api.ServerSpec{Node: "one", Address: "127.0.0.1:7443"}}
}

func authorityObject() api.Object {
	return &api.Authority{TypeMeta: kind("Authority"), ObjectMeta: metav1.ObjectMeta{Name: api.AuthorityName}, Spec: api.AuthoritySpec{
		CAs: []api.CertificateAuthority{{Fingerprint: "aa", Cert: "cert", Key: "key"}}, Active: "aa",
	}}
}

const marker = "open sesame, said the secret"

func secret(name string) api.Object {
	return &corev1.Secret{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}, ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Data: map[string][]byte{"password": []byte(marker + " " + name)},
	}
}

func create(list ...api.Object) command.Txn {
	t := command.Txn{Actor: "user/test"}
	for _, o := range list {
		t.Mutations = append(t.Mutations, api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o})
	}
	return t
}

// repositories are Git repositories as far as the archive sees them.
type repositories map[string][]byte

func (r repositories) Names() ([]string, error) { return slices.Collect(maps.Keys(r)), nil }

func (r repositories) Export(_ context.Context, name string, w io.Writer) error {
	_, err := w.Write(r[name])
	return err
}

// big is a repository of several pieces, whose bytes cannot be compressed.
var big = sync.OnceValue(func() []byte {
	b := make([]byte, 3<<20+17)
	x := uint64(1)
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
	}
	return b
})

var now = time.Date(2026, 11, 26, 16, 0, 0, 0, time.UTC)

func source() backup.Source {
	return backup.Source{
		State: cluster(), Repositories: repositories{"cluster": big(), "empty": nil, "shop": []byte("objects and refs")}, Version: "v1", Now: now,
	}
}

// small is a cluster with next to nothing in it.
var small = sync.OnceValue(func() backup.Source {
	s, r, _ := state.Reduce(state.New(), 1, command.Txn{Time: 1, Bootstrap: &command.Bootstrap{
		ClusterID:   "small",
		ServiceCIDR: netip.MustParsePrefix("10.97.0.0/16"), PodCIDR: netip.MustParsePrefix("10.98.0.0/16"),
		NodeMask: 24, DNS: netip.MustParseAddr("10.97.0.10"),
	}})
	if err := r.Err(); err != nil {
		panic(err)
	}
	s, r, _ = state.Reduce(s, 2, create(secret("a"), secret("b")))
	if err := r.Err(); err != nil {
		panic(err)
	}
	return backup.Source{State: s, Repositories: repositories{"cluster": []byte("git")}, Now: now}
})

type key struct {
	*age.X25519Identity
	backup.Protection
	backup.Keys
}

func newKey(t testing.TB) key {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return key{id, backup.Protection{Recipients: []age.Recipient{id.Recipient()}}, backup.Keys{Identities: []age.Identity{id}}}
}

var plain = backup.Protection{Plaintext: true}

func save(t testing.TB, src backup.Source, p backup.Protection) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := backup.Save(t.Context(), &b, src, p); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

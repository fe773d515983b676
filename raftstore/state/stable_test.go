package state_test

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/schemas/api"
)

// hashOfFormat1 is the hash that the first version of the state machine gave for
// format1Log: servers of two versions that apply the same log must agree.
const hashOfFormat1 = "d86838f764584ccaa6699b8a901ee5ccb8bd691fcd5d509e0a9daf9571309f80"

// TestFormat1MeansWhatItMeant: a log of format 1 leads to the state that it always led
// to, whatever has become faster since.
func TestFormat1MeansWhatItMeant(t *testing.T) {
	s, rejected := state.New(), 0
	next := format1Log()
	for i := range 4000 {
		after, r, _ := state.Reduce(s, uint64(i+1), next(s))
		if r.Rejected != nil {
			rejected++
		}
		s = after
	}
	if rejected == 0 || rejected > 3000 {
		t.Fatalf("%d of 4000 transactions were rejected, the log tests nothing", rejected)
	}
	if got := s.Hash(); got != hashOfFormat1 {
		t.Fatalf("the hash is %s, it was %s", got, hashOfFormat1)
	}
}

// format1Log makes transactions from a fixed seed.
func format1Log() func(*state.State) command.Txn {
	r := rand.New(rand.NewPCG(1, 2))
	n := 0
	return func(s *state.State) command.Txn {
		n++
		if n == 1 {
			return command.Txn{Time: 1_700_000_000_000, Bootstrap: bootstrap()}
		}
		tx := command.Txn{Time: 1_700_000_000_000 + int64(r.IntN(3000*n)), Actor: "user/x"}
		if r.IntN(2) == 0 {
			tx.Key = "k" + strconv.Itoa(r.IntN(5*n))
		}
		source := ""
		if r.IntN(4) == 0 {
			source = "s" + strconv.Itoa(r.IntN(3))
			parent := ""
			if o, ok := api.Get[*api.Source](s, "", source); ok {
				parent = o.Status.Applied
			}
			tx.Commit = commit(source, parent, "c"+strconv.Itoa(n)).Commit
		}
		for range r.IntN(4) {
			o := format1Object(r)
			if source != "" && r.IntN(10) > 0 {
				from(o, source)
			}
			m := mutation(api.Verb(r.IntN(4)+1), o)
			if r.IntN(4) == 0 {
				m.Grace = new(int64)
			}
			tx.Mutations = append(tx.Mutations, m)
		}
		return tx
	}
}

func format1Object(r *rand.Rand) api.Object {
	name, value := "n"+strconv.Itoa(r.IntN(60)), strconv.Itoa(r.IntN(3))
	switch r.IntN(6) {
	case 0:
		o := pod(name, []string{"", "a", "b"}[r.IntN(3)])
		o.Status.Message = value
		if yes := true; value != "0" {
			o.OwnerReferences = []metav1.OwnerReference{{Kind: "K", Name: value, UID: types.UID("uid-" + value), Controller: &yes}}
		}
		return o
	case 1:
		return service(name, ip([]string{"", "", "None", "10.97.0.3"}[r.IntN(4)]), func(s *corev1.Service) { s.Spec.SessionAffinity = corev1.ServiceAffinity(value) })
	case 2:
		o := node(name[:2])
		o.Labels = map[string]string{"v": value}
		return o
	case 3:
		o := sourceObject("s" + strconv.Itoa(r.IntN(3)))
		o.Spec.Path = value
		return o
	case 4:
		o := &corev1.Secret{Data: map[string][]byte{"v": []byte(value)}}
		meta(o, name)
		return o
	}
	return configMap(name, fmt.Sprint(value))
}

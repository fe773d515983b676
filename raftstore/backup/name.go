package backup

import (
	"cmp"
	"fmt"
	"path"
	"strconv"
	"strings"
	"time"
)

// Name is where a snapshot is found in a target. As text it is
// CLUSTERID/2026-11-26T16-00-00Z-rREVISION.decree, which sorts by cluster and time.
type Name struct {
	ClusterID string
	Time      time.Time // whole seconds, UTC
	Revision  uint64
}

const (
	// Suffix ends the name of every snapshot.
	Suffix     = ".decree"
	nameLayout = "2006-01-02T15-04-05Z"
)

// NameOf is the name of the snapshot that m describes.
func NameOf(m Manifest) Name {
	return Name{ClusterID: m.ClusterID, Time: m.Created.UTC().Truncate(time.Second), Revision: m.Revision}
}

// String returns the name as targets know it.
func (n Name) String() string {
	return fmt.Sprintf("%s/%s-r%d%s", n.ClusterID, n.Time.UTC().Format(nameLayout), n.Revision, Suffix)
}

// ParseName reads what [Name.String] writes, and nothing else.
func ParseName(s string) (Name, bool) {
	cluster, rest := path.Split(s)
	stem, ok := strings.CutSuffix(rest, Suffix)
	stamp, revision, cut := strings.Cut(stem, "-r")
	if !ok || !cut {
		return Name{}, false
	}
	n := Name{ClusterID: strings.TrimSuffix(cluster, "/")}
	var err error
	if n.Time, err = time.Parse(nameLayout, stamp); err != nil {
		return Name{}, false
	}
	if n.Revision, err = strconv.ParseUint(revision, 10, 64); err != nil {
		return Name{}, false
	}
	return n, validCluster(n.ClusterID) && n.String() == s
}

// validCluster keeps ids from meaning another folder.
func validCluster(id string) bool {
	return id != "" && len(id) <= 128 && id[0] != '.' && !strings.ContainsFunc(id, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.')
	})
}

// older compares two snapshots of one cluster.
func older(a, b Name) int {
	return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.Revision, b.Revision))
}

package ruleset

import (
	"fmt"
	"hash/fnv"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/wire"
)

// Tag marks a rule with a hash of what it should do, to find out later whether what is
// there came from this code: the user data of the rule, which for people who list rules is
// a comment. family is that of netlink messages.
func Tag(family uint8, rule []expr.Any) (string, error) {
	h := fnv.New64a()
	for _, e := range rule {
		b, err := expr.Marshal(family, e)
		if err != nil {
			return "", fmt.Errorf("encode %T: %w", e, err)
		}
		h.Write(b)
	}
	return string(fmt.Appendf([]byte{0, 24}, "decree %016x\x00", h.Sum64())), nil
}

// Tags reads the user data of the rules of each chain of a table, in order. The netlink
// library decodes the rules' expressions too, and not all of them.
func Tags(c *wire.Conn, family uint8, table string) (map[string][]string, error) {
	c.Reset()
	at, _ := c.Message(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, [4]byte{family, unix.NFNETLINK_V0})
	c.Attr(unix.NFTA_RULE_TABLE, table+"\x00")
	c.End(at)
	tags := map[string][]string{}
	err := c.Dump(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWRULE, func(body []byte) {
		chain, tag := "", ""
		wire.Attributes(body, func(kind uint16, v []byte) {
			switch kind {
			case unix.NFTA_RULE_CHAIN:
				chain = textOf(v)
			case unix.NFTA_RULE_USERDATA:
				tag = string(v)
			}
		})
		tags[chain] = append(tags[chain], tag)
	})
	return tags, err
}

// Tagged reports whether rules have these tags.
func Tagged(family uint8, tags []string, rules [][]expr.Any) (bool, error) {
	if len(tags) != len(rules) {
		return false, nil
	}
	for i, rule := range rules {
		if t, err := Tag(family, rule); err != nil || t != tags[i] {
			return false, err
		}
	}
	return true, nil
}

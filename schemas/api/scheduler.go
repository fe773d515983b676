package api

// AnnotationScheduler of a Service says how a node that balances by IPVS chooses between
// the endpoints: one of Schedulers. Other nodes choose at random. Users set it.
const AnnotationScheduler = "net.decree.dev/scheduler"

// Schedulers are those of IPVS that make sense with endpoints of equal weight
// (net/netfilter/ipvs): in turn (rr, wrr), by the fewest connections (lc, wlc), by the
// client's address (sh, and mh, by which few clients move when endpoints change).
var Schedulers = []string{"rr", "wrr", "lc", "wlc", "sh", "mh"}

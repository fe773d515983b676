package nft
import ("testing";"os/exec";"decree.dev/decree/netplane/netplanetest";"decree.dev/decree/netplane/render")
func TestZZ(t *testing.T){
	k := &kernel{netplanetest.NewLab(t), t}
	s, _ := k.Services()
	n := netplanetest.Nets[0]
	tb := render.Table{Range: only(n.Range), Cluster: only(n.Cluster), Pods: only(n.Pods), Services: []render.Service{
				{Port: render.Port{Addr: n.Service(1), Proto: render.TCP, Port: 80}, Endpoints: n.Endpoints(8080, netplanetest.Pods...)},
				{Port: render.Port{Addr: n.Service(2), Proto: render.TCP, Port: 80}, Endpoints: n.Endpoints(8080, netplanetest.Pods...), Affinity: 3600e9},
	}}
	s.Sync(t.Context(), tb)
	netplanetest.In(t, k.Path[netplanetest.Node], func() error {
		for _, c := range []string{"chain ip decree prerouting","chain ip decree postrouting","chain ip decree refuse","chain ip decree filter_input","chain ip decree lb_3","chain ip decree lb_3_3600","map ip decree services","map ip decree endpoints","map ip decree affinity","set ip decree live","set ip decree range"} {
			out, err := exec.Command("sh","-c","nft list "+c+" 2>&1").CombinedOutput()
			t.Logf("%s %v\n%s", c, err, out)
		}
		return nil
	})
}

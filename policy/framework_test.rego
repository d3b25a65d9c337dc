package sealvol_test

import data.sealvol
import rego.v1

test_below_takes_clean_paths_only if {
	sealvol.below("/a/b", "/a/")
	sealvol.below("/a/b/..c", "/a/")
	every path in ["/a/", "/a", "/ab", "/a//b", "/a/./b", "/a/..", "/a/b/../c", "/a/b/", ""] {
		not sealvol.below(path, "/a/")
	}
}

test_clean_paths if {
	every path in ["/a", "/a/b", "/a/..b", "/a/b.", "/...", "/a b"] {
		sealvol.clean(path)
	}
	every path in ["", "/", "a", "a/b", "/a/", "//a", "/a//b", "/.", "/..", "/a/./b", "/a/../b", "/a/..", "/a\u0000/b"] {
		not sealvol.clean(path)
	}
}

test_mounts_are_clear_on_above_and_below if {
	volumes := {"/mnt/a": {}, "/data": {}}
	every path in ["/mnt", "/mnt/a/b", "/mnt/a/b/c", "/data/x"] {
		not sealvol.mount_clear({"/x", path}) with sealvol.volume_at as volumes
	}
	sealvol.mount_clear({"/mnt/ab", "/mnt/b", "/m", "/mnt/a-b/c", "/mnt/a", "/dat", "/x/mnt/a"}) with sealvol.volume_at as volumes
	sealvol.mount_clear(set()) with sealvol.volume_at as volumes
	sealvol.mount_clear({"/x"}) with sealvol.volume_at as {}
}

test_exec_matches if {
	sealvol.exec_matches(["sh"], ["sh"])
	sealvol.exec_matches(["df", "..."], ["df"])
	sealvol.exec_matches(["df", "..."], ["df", "-h", "/"])
	sealvol.exec_matches(["..."], ["anything"])
	not sealvol.exec_matches(["sh"], ["sh", "-c"])
	not sealvol.exec_matches(["sh", "-c"], ["sh"])
	not sealvol.exec_matches(["df", "..."], [])
	not sealvol.exec_matches(["..."], [])
	not sealvol.exec_matches(["df", "-h", "..."], ["df"])
}

test_capabilities_with_and_without_prefix if {
	every c in ["CAP_CHOWN", "CHOWN"] {
		c in sealvol.default_capabilities
	}
	every c in ["CAP_SYS_ADMIN", "CAP_CAP_CHOWN", "chown", "CAP_", ""] {
		not c in sealvol.default_capabilities
	}
}

# Without input nothing holds, so each request is denied whatever its name.
test_nothing_is_allowed_without_input if {
	count(sealvol.verdict.denied) > 0 with input as {}
	every rpc in object.keys(sealvol.always) {
		count(sealvol.verdict.denied) > 0 with input as {"rpc": rpc}
		count(sealvol.verdict.denied) > 0 with input as {"rpc": rpc, "pod": null}
		count(sealvol.verdict.denied) > 0 with input as {"rpc": rpc, "pod": {}}
		count(sealvol.verdict.denied) > 0 with input as {"rpc": rpc, "pod": {}, "request": null, "state": null}
	}
}

test_every_rule_has_its_reason if {
	every list in [sealvol.always, sealvol.sealed_pod, sealvol.open_pod] {
		object.keys(list) == object.keys(sealvol.always)
		every _, rules in list {
			every rule in rules {
				contains(sealvol.reasons[rule], "; ")
			}
		}
	}
}

"""The source distributions that tasks are made from, each with its SHA-256; training and held-out never mix.

All are pure Python, carry their tests, and pass them with plain pytest on Python 3.11 without further packages.
HELDOUT serves evaluation alone: no tokenizer, corpus, trajectory or reward may come from it.
"""

TRAIN: dict[str, str] = {
    "toolz==1.2.0": "9667a038e9d6ecba37995e26cb2f59ec6420b6ad8dd9677de59db9b956b08490",
    "sqlparse==0.6.1": "ca722573f848ff2d30e40ea30f53a104b7dea7635ea9285891263eb2c58fb6e7",
    "cachetools==8.0.1": "deb1d376d4d28c2f33f3e3058043b005e0af75c35c094bd54053e27d2906ad95",
    "pyflakes==4.1.0": "592beb57058eb82eb190fb7514f2081c555c51000b029ff71286a681e6cf2f83",
    "tinydb==4.9.0": "6928b1fa785186bda7952a0ba05aaeedc883ede565ca9c7d608de44e5e75de70",
    "voluptuous==0.16.0": "006535e22fed944aec17bef6e8725472476194743c87bd233e912eb463f8ff05",
    "simpleeval==1.0.8": "b417f869c11f2de034eb919820a825f35d12ce99f63a43971947ce73679eb9ba",
    "h11==0.16.0": "4e35b956cf45792e4caa5885e69fba00bdbc6ffafbfa020300e549b208ee5ff1",
    "webcolors==25.10.0": "62abae86504f66d0f6364c2a8520de4a0c47b80c03fc3a5f1815fedbef7c19bf",
    "mistune==3.4.0": "2eaf7952af928ca8d33b779762effc1da517b62c6ad85ec8ca957e3b07b9782a",
    "unidiff==1.0.1": "d9425bc516390c54743a1045b2c1c97f02d245a913a241dd499f958adb2df998",
    "tomlkit==0.15.2": "83e32755ba1d20d9340bd069ee97e9f6232ba2346b63ffcba425de01f7e327a6",
    "pathspec==1.1.1": "17db5ecd524104a120e173814c90367a96a98d07c45b2e10c2f3919fff91bf5a",
}

HELDOUT: dict[str, str] = {
    "boltons==26.2.0": "d39cfd15c1a1c3bd4d705c82252fa9edb8e4f5e8cc039f8e39afac7b1b47e92c",
    "tabulate==0.10.0": "e2cfde8f79420f6deeffdeda9aaec3b6bc5abce947655d17ac662b126e48a60d",
    "inflection==0.5.1": "1a29730d366e996aaacffb2f1f1cb9593dc38e2ddd30c91250c6dde09ea9b417",
    "isodate==0.7.2": "4cd1aa0f43ca76f4a6c6c0292a85f40b35ec2e43e315b59f06e6d32171a953e6",
    "parse==1.22.4": "706d458feed5a81b02768d3156e8070baf6cee7d150a3a3c0cd43101a875c3b5",
    "schema==0.7.8": "e86cc08edd6fe6e2522648f4e47e3a31920a76e82cce8937535422e310862ab5",
    "xmltodict==1.0.4": "6d94c9f834dd9e44514162799d344d815a3a4faec913717a9ecbfa5be1bb8e61",
}

SHA256: dict[str, str] = TRAIN | HELDOUT

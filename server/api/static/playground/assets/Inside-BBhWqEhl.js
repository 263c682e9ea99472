import{a as r,f as t}from"./index-BhSCwkqR.js";var e=t("<h1>Look inside</h1>");function i(o){var a=e();r(o,a)}export{i as default};
